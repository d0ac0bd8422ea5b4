"""Tables, plots and a page from run folders alone: ``python -m lora_one.reports <output_dir>``."""
