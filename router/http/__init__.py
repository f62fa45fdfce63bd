"""The OpenAI protocol over HTTP, around router.answer: no FastAPI here, that is router/app.py; no Ray."""
