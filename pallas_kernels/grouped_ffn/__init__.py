"""Gated feed-forward networks over route-sorted rows, one expert block a group."""
