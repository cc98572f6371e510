"""The recipe: schema, checks of what does not go together, loading. `hola_megatron.config` re-exports it."""
