"""Bytes on disk, with nothing of ours in them: whole files, strict formats, no trust."""
