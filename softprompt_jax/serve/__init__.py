"""`softprompt serve`: one frozen model and a bank of prompts behind HTTP, with a page to try them.

`server` opens the socket and stops in order, `app` is HTTP, `requests` what a client may ask and is answered,
`engine` the thread that runs the model, `limits` what a server accepts, `metrics` the counters for Prometheus.
Begin with `engine.py`."""
