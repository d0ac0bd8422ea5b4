"""Base models: which files, which revision, tokenizer, weights; and the adapter on top."""
