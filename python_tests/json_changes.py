"""Damage to the JSON files that the package reads."""

import json


def change(*keys, value):
    """A change of one thing in the file."""

    def changed(content):
        at = content
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value
        return json.dumps(content)

    return changed
