"""The ranks of one run: who they are, what they say to each other, how a base is sharded."""
