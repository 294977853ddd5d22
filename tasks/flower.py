"""The app that Flower loads: `celery -A tasks.flower flower`."""

from tasks.app import make_app, settings

app = make_app(settings(), "client")
