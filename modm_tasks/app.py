"""The Celery app. Every process that touches the broker uses this one: the shortest visibility timeout among apps on
the same Redis wins, so a second app with defaults would redeliver running work.

Why each setting is what it is: field measurements in docs/decisions/0001 (broker) and 0002 (pool).
"""

from __future__ import annotations

from celery import Celery

from modm_tasks import queues
from modm_tasks.errors import UnavailableError
from modm_tasks.redis_client import redis_url
from modm_tasks.settings import Settings, get_settings


def make_app(settings: Settings) -> Celery:
    """A configured app. Does not connect."""
    try:
        url = redis_url(settings)
    except UnavailableError:
        url = "redis://127.0.0.1:6379/0"  # importing the module must not fail; connecting says what is wrong
    url = url.replace("unix://", "redis+socket://", 1) if url.startswith("unix://") else url
    hard_s = settings.worker.task_time_limit_s
    transport = {
        "visibility_timeout": int(2.5 * hard_s),
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "polling_interval": 0.2,
        "queue_order_strategy": "priority",  # serve queues in the order in which a role lists them
        "socket_timeout": 15,
        "socket_keepalive": not url.startswith("redis+socket"),
        "sep": ":",
    }
    app = Celery("modm", broker=url, include=["workers.tasks"])
    app.conf.update(
        task_queues=[queues.queue(queues.LARGE_GEN), queues.queue(queues.SMALL_REFINE)],
        task_default_queue=queues.LARGE_GEN,
        task_create_missing_queues=False,
        worker_direct=True,  # a queue of each worker's own, for `prepare_role`
        task_routes={task: {"queue": queue} for queue, task in queues.TASK_OF_QUEUE.items()},
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        # The ledger is the result store; Flower learns results from events.
        task_ignore_result=True,
        task_acks_late=True,
        # A token of a dead worker need not come back: the ledger's watchdog sends another within seconds.
        task_reject_on_worker_lost=False,
        worker_prefetch_multiplier=1,
        worker_pool="prefork",
        worker_pool_start_method="spawn",
        worker_concurrency=1,
        worker_proc_alive_timeout=600,
        # Off: it would kill the GPU child, and the models in it, at every connection loss. The lease does better.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_soft_shutdown_timeout=settings.worker.soft_shutdown_s,
        worker_enable_soft_shutdown_on_idle=False,
        task_time_limit=hard_s,
        task_track_started=True,
        worker_send_task_events=True,
        task_send_sent_event=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=transport,
        event_queue_expires=60,
        task_publish_retry_policy={"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5},
    )
    return app


app = make_app(get_settings())
