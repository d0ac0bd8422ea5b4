"""The run, as a command line asks for it.

``run_exp.py`` hands the command to ``cli``; ``config`` makes a configuration of it, ``plan`` looks
for all that can be wrong before anything is loaded, and ``stages`` goes through ``data``,
``models``, ``training``, ``export`` and ``evaluation``. ``records`` writes down what happened and
``tracking`` copies it to W&B. ``distributed``, ``resuming``, ``sweeps`` and ``slurm`` are for runs
on several processes, runs that are stopped, many runs, and a cluster.
"""
