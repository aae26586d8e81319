"""What `sky` says, without a cloud: answers in SkyPilot's own form (recorded from 0.14.1) and a list of how it was called."""

import json
import os
import sys
from pathlib import Path

state = Path(os.environ["STAND_IN"])
verb, *arguments = sys.argv[1:]
recorded = json.loads(state.read_text())
wanted = ("ROENTGEN_API_KEY", "RAY_AUTH_TOKEN")
recorded["calls"].append({"words": [verb, *arguments], "secrets": {name: os.environ.get(name, "") for name in wanted}})
code = 0
if verb == "status":
    print("Hint: what SkyPilot prints before its JSON")
    print(json.dumps(recorded["clusters"], indent=2))
elif verb in recorded["fails"]:
    print(f"{verb} does not work today")
    code = recorded["fails"][verb]
elif verb == "launch":
    name = arguments[arguments.index("--cluster") + 1]
    recorded["tasks"].append(Path(arguments[3]).read_text())
    recorded["clusters"].append({"name": name, "status": "UP", "nodes": 1, "resources_str": "1x", "autostop": 15})
elif verb == "exec":
    recorded["tasks"].append(Path(arguments[1]).read_text())
elif verb == "down":
    recorded["clusters"] = [one for one in recorded["clusters"] if one["name"] != arguments[-1]]
state.write_text(json.dumps(recorded))
sys.exit(code)
