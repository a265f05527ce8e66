"""Tiny data sets in the official layouts of their publishers."""
