"""What stands before a model's HTTP: a clock, keys, size, well-formed JSON, a wait for the engine.

Pure ASGI, so that a streamed byte passes through plain calls and nothing else. From the outside:

    ResponseTime(BodyLimit(ApiKeys(JsonGuard(Admission(app)))))

They log no request, and of a key they keep its digest only.
"""
