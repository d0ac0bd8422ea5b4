"""What a command line means: composed by Hydra, spelled as published, judged by the schema."""
