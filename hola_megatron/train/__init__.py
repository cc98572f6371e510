"""The training program (`python -m hola_megatron.train`): loop, checkpoint schedule, incidents, run folder, replay."""
