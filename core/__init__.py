"""Shared by every side: settings, messages, arithmetic, files, training; imports no other."""
