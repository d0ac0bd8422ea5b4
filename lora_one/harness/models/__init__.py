"""Base models: which files, which revision, tokenizer, weights."""
