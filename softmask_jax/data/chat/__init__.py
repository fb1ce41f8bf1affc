"""Conversations to rows of tokens: files, templates, length buckets, padding."""
