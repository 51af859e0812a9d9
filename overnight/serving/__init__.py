"""The HTTP service of a registered model: what it answers with is always the version behind an alias.

    request → bodies (read, checked) → batching (waits with others) → Served.score (one worker thread) → answer
                                                    ↑
                          follow (a thread): alias → download → load → smoke test → switch

`app.create_app` puts the parts together, `server.run` binds a port and runs them until a signal comes.
"""
