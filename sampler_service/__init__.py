"""The sampler: one base model in vLLM, and every published version of every adapter.

    server.py ─────► sampler.py ──► versions.py            which versions are live, and who runs on them
    proto in,        validation,    push.py                a version on its way in
    proto out        the domain     engine.py              vLLM; its workers run worker_extension.py
                                                           and, on a CPU, cpu_lora.py

`service.py` wires them up and lives through start, SIGTERM and the engine's death. Only `engine.py` and what runs in
vLLM's workers import vLLM; only `server.py` and `service.py` know gRPC.
"""
