"""One host: netns, CNI, bundle, runsc, journal, reconcile, audit. No Celery, no Redis."""
