"""Drafting strategies, one file each; `strategy` says what one is."""
