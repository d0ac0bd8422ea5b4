"""SLURM as a launcher: points become the tasks of one job array, through submitit.

``options`` says what a launcher means to sbatch, ``submit`` hands the array over, ``queue`` asks
SLURM about it and ``watch`` waits for its end. Nothing here imports torch.
"""
