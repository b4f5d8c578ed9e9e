"""Edit streams and probes; text only, no model and no tokenizer."""
