"""Layers that hold edits around untouched base weights, and their files on disk."""
