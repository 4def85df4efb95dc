"""Chat templates: from a list of messages to the text, and the token ids, that a model was trained on.

``ChatTemplates`` are those of a checkpoint or an engine, ``ChatEncoder`` renders and encodes with them.
"""
