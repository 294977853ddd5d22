"""Celery app, messages, states, workflow, record. No subprocess."""
