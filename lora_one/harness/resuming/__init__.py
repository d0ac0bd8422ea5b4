"""Stopped and gone on without a trace: checkpoints, preemption, time limits."""
