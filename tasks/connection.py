"""The connection to the broker's Redis, and what is said of it to people."""

import re
import ssl
from typing import Any

import redis
import redis.asyncio
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from worker.errors import BadInput, BrokerError
from worker.settings import Settings


def connect(settings: Settings, *, patient: bool = False) -> "redis.Redis":
    """A client of the broker's Redis; `patient` ones outlive a short restart of it.

    Raises:
        BadInput: The broker's URL has an option that is none.
    """
    retry = Retry(ExponentialBackoff(cap=1.0, base=0.05), 8 if patient else 0)
    try:
        return redis.Redis.from_url(
            _url(settings),
            decode_responses=True,
            socket_timeout=30 if patient else 4,
            socket_connect_timeout=4,
            retry=retry,
            **_options(settings),
        )
    except ValueError as error:
        raise BadInput(f"broker {public_url(settings)}", str(error), "check SANDBATCH_BROKER_URL") from None


def connect_raw(settings: Settings) -> "redis.Redis":
    """As `connect`, for a client of conversations: values are bytes, nothing is tried again unasked."""
    return redis.Redis.from_url(
        _url(settings), socket_timeout=4, socket_connect_timeout=4, retry=None, **_options(settings)
    )


def connect_async(settings: Settings) -> "redis.asyncio.Redis":
    """For a host's conversations, in its asyncio loop: values are bytes, nothing is tried again unasked."""
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        _url(settings),
        max_connections=16,
        timeout=10,
        socket_timeout=10,
        socket_connect_timeout=4,
        health_check_interval=0,
        retry=None,
        **_options(settings),
    )
    return redis.asyncio.Redis.from_pool(pool)


def _url(settings: Settings) -> str:
    url = settings.broker_url or f"unix://{settings.broker_socket}"
    return url.replace("redis+socket://", "unix://", 1)


def _options(settings: Settings) -> dict[str, Any]:
    # Without CLIENT SETINFO, which our users of the broker need not be allowed, and Redis 7.0 does not know.
    return {"driver_info": None, **tls(settings)}


def tls(settings: Settings) -> dict[str, Any]:
    """What makes the broker prove who it is, for redis-py and for Celery; empty where its URL has no TLS."""
    if not settings.broker_url.startswith("rediss://"):
        return {}
    known = {"ssl_ca_certs": str(settings.broker_ca)} if settings.broker_ca else {}  # else the system's
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True, **known}


def check(client: "redis.Redis", settings: Settings) -> None:
    """Ask the broker for a sign of life.

    Raises:
        BrokerError: None within some seconds; the error names the URL without its password.
        BadInput: The broker's URL has an option that is none.
    """
    try:
        client.ping()
    except (redis.RedisError, OSError) as error:
        raise BrokerError(f"broker {public_url(settings)}", _reason(error), _todo(settings)) from None
    except TypeError as error:  # redis-py makes an argument of whatever stands behind the `?`
        raise BadInput(f"broker {public_url(settings)}", str(error), "check SANDBATCH_BROKER_URL") from None


def public_url(settings: Settings) -> str:
    """The broker's URL without its password."""
    url = settings.broker_url or f"redis+socket://{settings.broker_socket}"
    scheme, _, rest = url.partition("://")
    login, at, place = re.sub(r"(?<=[?&]password=)[^&]*", "***", rest).rpartition("@")
    user = login.partition(":")[0]
    return f"{scheme}://{user + ':***@' if at else ''}{place}"


def _reason(error: Exception) -> str:
    if isinstance(error, redis.AuthenticationError):
        return "refused the password"
    return str(error).split("\n")[0][:200] or type(error).__name__


def _todo(settings: Settings) -> str:
    if settings.is_broker_embedded:
        return "start it with sandbatch up, or name another with SANDBATCH_BROKER_URL"
    return "check SANDBATCH_BROKER_URL and that the broker runs"
