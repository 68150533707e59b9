"""What a conversation is, and how a chat template and a tokenizer make token ids of it."""
