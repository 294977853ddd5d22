"""Parses, enqueues, shows. No root and no runsc, but for the commands of a host."""
