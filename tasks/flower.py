"""The app that Flower loads (`celery -A tasks.flower flower`), and where ours is stricter than Flower."""

import logging
import os

from flower import urls
from flower.app import Flower
from flower.inspector import Inspector
from flower.views.monitor import Metrics
from kombu.exceptions import KombuError
from tornado import web

from tasks.app import make_app, settings

app = make_app(settings(), "client")


class GuardedMetrics(Metrics):  # type: ignore[misc]  # Flower has no types
    """Flower hands its metrics to everybody: here the password is asked for, as on any other page."""

    @web.authenticated
    async def get(self) -> None:
        await super().get()


def start(self: Flower) -> None:
    """Serve until a signal, then leave at once.

    Python would wait for Flower's threads first, and one that tells workers something waits for the
    broker for ever. There is nothing to lose: Flower keeps all in memory.
    """
    self.io_loop.add_callback(self.events.on_enable_events)  # else 5 s pass before the first time
    try:
        start_only(self)
    except (KeyboardInterrupt, SystemExit):
        turn_events_off()
        logging.shutdown()
        os._exit(0)


def turn_events_off() -> None:
    """Let the workers send no events for nobody; where another Flower runs, it turns them on again."""
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=2)  # a broker that is away holds up no end
            app.control.disable_events(connection=connection)
    except (KombuError, OSError) as error:
        logging.getLogger("sandbatch").warning("the workers go on to send events: %s", error)


METRICS = "/metrics"
urls.handlers[urls.handlers.index((METRICS, Metrics))] = (METRICS, GuardedMetrics)
# A worker answers no others (`revoked`, `conf`): not asking spares its log, and a second a page.
Inspector.inspect_methods = ("stats", "active_queues", "registered", "scheduled", "active", "reserved")
start_only, Flower.start = Flower.start, start
