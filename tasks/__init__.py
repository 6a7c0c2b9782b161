"""What is trained: task sets, data sets, prompts, tokenised lengths and sampling."""
