"""Self-contained files that travel with an export: configuration, model, tokenizer and processors."""
