"""Text to batches: tokenizer, documents, and the Grain pipeline."""
