"""A stand-in for the hub on this machine: what huggingface_hub asks of it to make a repository and push."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_thisIsASecretOfTheTest"


class Hub:
    """Repositories, their files, and what was asked."""

    def __init__(self):
        self.private, self.files, self.blobs, self.asked = {}, {}, {}, []
        self.refuse = False


def handler(hub):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, body, status=200, **headers):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def body(self):
            return self.rfile.read(int(self.headers["Content-Length"] or 0))

        def allowed(self):
            hub.asked.append(f"{self.command} {self.path}")
            if self.headers["Authorization"] != f"Bearer {TOKEN}" or hub.refuse:
                self.reply({"error": f"not with {self.headers['Authorization']}"}, 403)
                return False
            return True

        def do_GET(self):
            if not self.allowed():
                return
            repo = self.path.removeprefix("/api/models/")
            if repo in hub.private:
                self.reply({"id": repo, "private": hub.private[repo], "sha": "0" * 40, "siblings": []})
            else:
                self.reply({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")

        def do_PUT(self):  # the storage behind the hub takes no token
            data = self.body()
            assert hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]
            hub.blobs[self.path.rpartition("/")[2]] = data
            self.reply({})

        def do_POST(self):
            raw = self.body()
            if not self.allowed():
                return
            root = f"http://{self.headers['Host']}"
            if self.path == "/api/validate-yaml":
                self.reply({"errors": [], "warnings": []})
            elif self.path == "/api/repos/create":
                asked = json.loads(raw)
                repo = f"{asked['organization']}/{asked['name']}"
                hub.private[repo] = asked.get("private", asked.get("visibility") == "private")
                self.reply({"url": f"{root}/{repo}"})
            elif "/preupload/" in self.path:
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(raw)["files"]
                ]
                self.reply({"files": files})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**entry, "actions": {"upload": {"href": f"{root}/blob/{entry['oid']}"}}}
                    for entry in json.loads(raw)["objects"]
                ]
                self.reply({"transfer": "basic", "objects": objects})
            else:
                assert "/commit/" in self.path
                self.commit(root, [json.loads(line) for line in raw.splitlines()])

        def commit(self, root, lines):
            repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            kept = hub.files.setdefault(repo, {})
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    kept[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    kept[value["path"]] = hub.blobs[value["oid"]]
            self.reply(
                {"commitUrl": f"{root}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
            )

    return Handler


@contextmanager
def running_hub(monkeypatch):
    """The stand-in, asked instead of the hub."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
