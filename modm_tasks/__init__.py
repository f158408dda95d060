"""What travels between MoDM's processes: settings, the Celery app, messages, the request ledger, errors.

Nothing here imports torch, diffusers, open_clip or qdrant, so that every process may import all of it cheaply.
"""

__version__ = "0.1.0"
