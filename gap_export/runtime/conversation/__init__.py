"""Conversations: what lies in the cache, what is read of it, and answers as they are made."""
