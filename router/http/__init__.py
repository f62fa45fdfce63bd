"""The OpenAI protocol over HTTP, around router.service: no FastAPI here, that is router/app.py; no Ray."""
