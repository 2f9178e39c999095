"""The node watcher: turns a cloud's notice that a machine will be taken away into a Ray drain of its node.

One small process per node. Sources (`sources.py`: AWS, GCP, Azure, a file, or anybody's own) are polled; what they say
becomes `Notice`s; `watch.py` decides when one is acted on; `local.py` knows which raylets are on this machine and
drains them; `wrapper.py` does the same when the machine's own shutdown signal is the notice.
Only `local.py` comes near Ray.
"""
