"""No address that a client sends is ever fetched: a server that counts its visitors stands for all addresses."""

import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import requests
from PIL import Image

from tests.serve.conftest import picture, png

Files = dict[str, Any]


@dataclass
class Canary:
    """A server that notes who has asked it for what, or has only connected."""

    url: str = ""
    seen: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    found = Canary()

    class Handler(BaseHTTPRequestHandler):
        def setup(self) -> None:
            found.seen.append("connected")
            super().setup()

        def do_GET(self) -> None:
            found.seen.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png(picture()))

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}/a.png"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


def documents(url: str) -> dict[str, bytes]:
    """Files that tell programs that believe them to fetch `url`."""
    svg = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="9" height="9">'
    entity = f'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "{url}">]>'
    texts = {
        "address": url,
        "svg image": f'{svg}<image href="{url}"/></svg>',
        "svg xlink": f'{svg}<image xlink:href="{url}" width="9" height="9"/></svg>',
        "svg style": f'<?xml-stylesheet href="{url}"?>{svg}</svg>',
        "svg import": f"{svg}<style>@import url({url});</style></svg>",
        "svg foreign": f'{svg}<foreignObject><iframe src="{url}"/></foreignObject></svg>',
        "xml entity": f"{entity}{svg}<text>&x;</text></svg>",
        "xml parameter entity": f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY % y SYSTEM "{url}"> %y;]><x/>',
        "mvg": f"push graphic-context\nviewbox 0 0 9 9\nimage over 0,0 9,9 '{url}'\npop graphic-context\n",
        "mvg fill": f"push graphic-context\nfill 'url({url})'\npop graphic-context\n",
        "msl": f'<?xml version="1.0"?><image><read filename="{url}"/></image>',
        "playlist": f"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10.0,\n{url}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{url}'\n",
        "html": f'<html><img src="{url}"><meta http-equiv="refresh" content="0;url={url}"></html>',
        "shortcut": f"[InternetShortcut]\nURL={url}\n",
        "pdf": f"%PDF-1.4\n1 0 obj<</Type/Catalog/OpenAction<</S/URI/URI({url})>>>>endobj\ntrailer<</Root 1 0 R>>\n",
        "pdf stream": f"%PDF-1.4\n1 0 obj<</F<</FS/URL/F({url})>>/Length 0>>stream\nendstream endobj\n",
        "postscript": f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({url}) (r) file run\n",
        "vrt": f'<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1">'
        f'<SimpleSource><SourceFilename relativeToVRT="0">/vsicurl/{url}</SourceFilename></SimpleSource>'
        "</VRTRasterBand></VRTDataset>",
        "wms": f'<GDAL_WMS><Service name="TMS"><ServerUrl>{url}</ServerUrl></Service></GDAL_WMS>',
        "dzi": f'<Image Format="png" Url="{url}" xmlns="http://schemas.microsoft.com/deepzoom/2008"/>',
        "iiif": json.dumps({"@context": "http://iiif.io/api/image/3/context.json", "id": url, "width": 9, "height": 9}),
        "references": json.dumps({"version": 1, "refs": {".zgroup": "{}", "0/0.0": [url, 0, 9]}}),
        "job": json.dumps({"image": url, "url": url, "$ref": url}),
    }
    return {name: text.encode() for name, text in texts.items()}


def pictures_with(url: str) -> dict[str, bytes]:
    """Good pictures whose metadata name `url`."""
    image = Image.fromarray(picture(40, 50))
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a xmlns:l="{url}" l:href="{url}">{url}</a></x:xmpmeta>'.encode()
    made: dict[str, bytes] = {}
    for fmt in ("JPEG", "WEBP"):
        stored = BytesIO()
        image.save(stored, fmt, xmp=xmp)
        made[f"{fmt} XMP"] = stored.getvalue()
    stored = BytesIO()
    image.save(stored, "TIFF", tiffinfo={700: xmp, 270: url, 33432: url})
    made["TIFF XMP"] = stored.getvalue()
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp), (b"tEXt", b"URL\0" + url.encode()))
    )
    plain = png(np.asarray(image))
    made["PNG text"] = plain[:33] + chunks + plain[33:]
    return made


def requests_for(url: str, good: bytes) -> dict[str, dict[str, Any]]:
    """Requests that name `url` elsewhere than in a picture."""
    image = ("a.png", good)
    named = {
        "an address": url,
        "a share": rf"\\{url.removeprefix('http://')}",
        "a file": "file:///etc/hostname",
        "a way up": "../../../../etc/hostname",
        "a command": f"| curl {url}",
        "a coder": f"https:{url}",
    }
    found: dict[str, dict[str, Any]] = {
        f"name: {name}": {"files": {"image": (text, good)}} for name, text in named.items()
    }
    for option in ("image", "mask", "model", "callback", "webhook", "store"):
        found[f"option: {option}"] = {"files": {"image": image, "options": (None, json.dumps({option: url}))}}
    found |= {
        "field: image": {"files": {"image": (None, url)}},
        "field: url": {"files": {"image": image, "url": (None, url)}},
        "mask: address": {"files": {"image": image, "mask": ("m.png", url)}},
        "query": {"files": {"image": image}, "params": {"url": url, "image": url, "callback": url}},
        "part elsewhere": {"files": {"image": ("a.png", b"", f'message/external-body; access-type=URL; URL="{url}"')}},
        "body elsewhere": {"data": b"", "headers": {"Content-Type": f'message/external-body; URL="{url}"'}},
        "a form": {"data": {"image": url}},
        "json": {"json": {"image": url}},
        "headers": {
            "files": {"image": image},
            "headers": dict.fromkeys(("Content-Location", "X-Forwarded-Host", "Forwarded", "Referer", "Link"), url),
        },
    }
    return found


def test_no_address_is_fetched(service, canary):
    good = png(picture(40, 50, seed=3))
    asked: dict[str, Files] = {}
    for name, data in {**documents(canary.url), **pictures_with(canary.url)}.items():
        asked[f"image: {name}"] = {"files": {"image": ("a.png", data)}}
    asked |= requests_for(canary.url, good)
    assert len(asked) >= 40
    for name, request in asked.items():
        answer = service.ask("POST", "/v1/restorations", **request)
        assert answer.status_code in (200, 202, 400, 413, 415, 422), (name, answer.text)
        if answer.status_code == 202:
            assert service.ended(answer.json())["state"] == "done", name
    for address in (f"/iiif/3/{quote(canary.url, safe='')}/info.json", f"/iiif/manifest/{quote(canary.url, safe='')}"):
        assert service.ask("GET", address).status_code == 404
    for line in (f"GET {canary.url} HTTP/1.1", f"CONNECT {canary.url.split('/')[2]} HTTP/1.1"):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as client:
            client.sendall(f"{line}\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            assert int(client.recv(100).split()[1]) in (400, 404, 405), line
    assert canary.seen == []
    assert requests.get(canary.url, timeout=10).ok
    assert canary.seen == ["connected", "/a.png"]  # it would have noticed
