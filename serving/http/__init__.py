"""OpenAI's HTTP interface to one engine, on Starlette and uvicorn."""
