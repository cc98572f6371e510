"""Timing of training steps: time by part, memory by phase, overlap of communication, sweeps."""
