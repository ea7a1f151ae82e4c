"""`softprompt serve`: one frozen model and a bank of prompts behind HTTP, with a page to try them.

`server` opens the socket and stops in order, `app` is HTTP, `requests` what a client may ask and is answered, `openai`
the same in OpenAI's protocol, `engine` the thread that runs the model on `jobs`, `limits` what a server accepts,
`metrics` the counters for Prometheus, `uploads` prompts that clients send.
Begin with `engine.py`."""
