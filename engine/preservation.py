"""A receipt in the words of archives: a PREMIS 3.0 event, and a METS 1.12 document.

PREMIS  Data Dictionary for Preservation Metadata, version 3.0 (Library of Congress)
METS    Metadata Encoding and Transmission Standard, version 1.12
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_URL, uuid5
from xml.etree import ElementTree as Xml

from engine.generated_map import GENERATED

PREMIS = "http://www.loc.gov/premis/v3"
METS = "http://www.loc.gov/METS/"
XLINK = "http://www.w3.org/1999/xlink"
XSI = "http://www.w3.org/2001/XMLSchema-instance"
PREMIS_SUFFIX = ".premis.xml"
METS_SUFFIX = ".mets.xml"

_MEDIA_TYPES = {
    ".jp2": "image/jp2",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".png": "image/png",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".webp": "image/webp",
    ".xml": "text/xml",
}
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""XML 1.0 has no way to say these, escaped or not; a file name may hold them."""

for _prefix, _uri in (("premis", PREMIS), ("mets", METS), ("xlink", XLINK), ("xsi", XSI)):
    Xml.register_namespace(_prefix, _uri)

Document = Mapping[str, Any]
"""What `engine.receipt.read_receipt` gives."""


def premis_xml(document: Document) -> bytes:
    """One event of type modification, its agent (the engine with its model), and the files it was about."""
    root = Xml.Element(f"{{{PREMIS}}}premis", {"version": "3.0"})
    objects = [("source", "source", document["input"]), ("mask", "source", document["mask"])]
    objects += [("outcome", "outcome", entry) for entry in document["outputs"].values()]
    objects = [(use, role, entry) for use, role, entry in objects if entry is not None]
    for use, _, entry in objects:
        _premis_object(root, entry, use)
    event = _add(root, PREMIS, "event")
    _identify(event, "event", _event_id(document))
    _add(event, PREMIS, "eventType", "modification")
    _add(event, PREMIS, "eventDateTime", document["finished"])
    generated, parameters = document["generated"], document["plan"]["parameters"]
    detail = ", ".join(f"{name} {value}" for name, value in parameters.items())
    information = _add(event, PREMIS, "eventDetailInformation")
    _add(information, PREMIS, "eventDetail", f"restoration (plan {document['plan_id']}): {detail}")
    result = _add(event, PREMIS, "eventOutcomeInformation")
    _add(result, PREMIS, "eventOutcome", "success")
    note = f"{generated['missing_px']} of {generated['of_px']} pixels were missing. {generated['statement']}"
    _add(_add(result, PREMIS, "eventOutcomeDetail"), PREMIS, "eventOutcomeDetailNote", note)
    agent = _add(event, PREMIS, "linkingAgentIdentifier")
    _add(agent, PREMIS, "linkingAgentIdentifierType", "local")
    _add(agent, PREMIS, "linkingAgentIdentifierValue", _agent_id(document))
    _add(agent, PREMIS, "linkingAgentRole", "executing program")
    for use, role, entry in objects:
        link = _add(event, PREMIS, "linkingObjectIdentifier")
        _add(link, PREMIS, "linkingObjectIdentifierType", "local")
        _add(link, PREMIS, "linkingObjectIdentifierValue", f"{use}/{entry['name']}")
        _add(link, PREMIS, "linkingObjectRole", role)
    _premis_agent(root, document)
    return _serialized(root)


def mets_xml(document: Document, *, sidecars: Mapping[str, Document]) -> bytes:
    """The files of a picture with their checksums, by use, and one division that holds them all.

    `sidecars` are entries (name, sha256, bytes) of the receipt and of the PREMIS event, by "json" and "premis". A
    folder has no checksum in METS; the receipt and PREMIS hold its digest.
    """
    name = document["plan"]["name"]
    root = Xml.Element(f"{{{METS}}}mets", {"OBJID": document["plan_id"], "LABEL": _text(name), "TYPE": "restoration"})
    header = _add(root, METS, "metsHdr", CREATEDATE=document["finished"])
    agent = _add(header, METS, "agent", ROLE="CREATOR", TYPE="OTHER", OTHERTYPE="SOFTWARE")
    _add(agent, METS, "name", _agent_id(document))
    if "premis" in sidecars:
        administrative = _add(root, METS, "amdSec", ID="amd")
        event = _add(administrative, METS, "digiprovMD", ID="event")
        reference = _add(event, METS, "mdRef", MDTYPE="PREMIS", LOCTYPE="URL", MIMETYPE="text/xml")
        reference.set(f"{{{XLINK}}}href", _href(sidecars["premis"]["name"]))
    outputs = dict(document["outputs"])
    generated = outputs.pop(GENERATED, None)
    groups = {
        "source": list(_sources(document)),
        "restored": list(outputs.values()),
        "generated-pixels": [] if generated is None else [generated],
        "provenance": list(sidecars.values()),
    }
    section = _add(root, METS, "fileSec")
    structure = _add(root, METS, "structMap", TYPE="PHYSICAL")
    division = _add(structure, METS, "div", TYPE="picture", LABEL=_text(name))
    for use, entries in groups.items():
        group = _add(section, METS, "fileGrp", USE=use) if entries else None
        for number, entry in enumerate(entries):
            assert group is not None
            identifier = f"{use}-{number}"
            file = _add(group, METS, "file", ID=identifier, **_mets_fixity(entry))
            # Where the source is, is for the archive to say; a restored file of the same name is another one.
            place = {"LOCTYPE": "OTHER", "OTHERLOCTYPE": "file name"} if use == "source" else {"LOCTYPE": "URL"}
            _add(file, METS, "FLocat", **place).set(f"{{{XLINK}}}href", _href(entry["name"]))
            _add(division, METS, "fptr", FILEID=identifier)
    return _serialized(root)


def _sources(document: Document) -> Iterator[Document]:
    yield from (document[name] for name in ("input", "mask") if document[name] is not None)


def _premis_object(root: Xml.Element, entry: Document, use: str) -> None:
    """A file with its fixity; a folder is a representation, which has none in PREMIS, so it is a property there.

    Its use is part of the identifier, for a picture, its mask and its restoration may bear the same name.
    """
    is_file = entry["digest_of"] == "file"
    thing = _add(root, PREMIS, "object")
    thing.set(f"{{{XSI}}}type", "premis:file" if is_file else "premis:representation")
    _identify(thing, "object", f"{use}/{entry['name']}")
    if is_file:
        characteristics = _add(thing, PREMIS, "objectCharacteristics")
        fixity = _add(characteristics, PREMIS, "fixity")
        _add(fixity, PREMIS, "messageDigestAlgorithm", "SHA-256")
        _add(fixity, PREMIS, "messageDigest", entry["sha256"])
        _add(characteristics, PREMIS, "size", str(entry["bytes"]))
        designation = _add(_add(characteristics, PREMIS, "format"), PREMIS, "formatDesignation")
        _add(designation, PREMIS, "formatName", _media_type(entry["name"]))
    else:
        properties = _add(thing, PREMIS, "significantProperties")
        what = (
            f"SHA-256 of the sorted paths and SHA-256 of its {'shards' if entry['digest_of'] == 'shards' else 'files'}"
        )
        _add(properties, PREMIS, "significantPropertiesType", what)
        _add(properties, PREMIS, "significantPropertiesValue", entry["sha256"])
    _add(thing, PREMIS, "originalName", entry["name"])


def _premis_agent(root: Xml.Element, document: Document) -> None:
    model = document["model"]
    agent = _add(root, PREMIS, "agent")
    _identify(agent, "agent", _agent_id(document))
    _add(agent, PREMIS, "agentName", "cra-srgan-engine")
    _add(agent, PREMIS, "agentType", "software")
    _add(agent, PREMIS, "agentVersion", document["software"]["cra-srgan-engine"])
    _add(agent, PREMIS, "agentNote", f"model {model['name']}, SHA-256 {model['sha256']}, licence {model['licence']}")
    versions = ", ".join(f"{name} {version}" for name, version in document["software"].items())
    _add(agent, PREMIS, "agentNote", f"with {versions}")


def _identify(parent: Xml.Element, kind: str, value: str) -> None:
    identifier = _add(parent, PREMIS, f"{kind}Identifier")
    _add(identifier, PREMIS, f"{kind}IdentifierType", "UUID" if kind == "event" else "local")
    _add(identifier, PREMIS, f"{kind}IdentifierValue", value)


def _event_id(document: Document) -> str:
    return str(uuid5(NAMESPACE_URL, f"{document['plan_id']} {document['finished']}"))


def _agent_id(document: Document) -> str:
    version, model = document["software"]["cra-srgan-engine"], document["model"]
    return f"cra-srgan-engine {version} with model {model['name']} {model['sha256'][:16]}"


def _mets_fixity(entry: Document) -> dict[str, str]:
    if entry["digest_of"] != "file":
        return {}
    checksum = {"CHECKSUM": entry["sha256"], "CHECKSUMTYPE": "SHA-256"}
    return {"MIMETYPE": _media_type(entry["name"]), "SIZE": str(entry["bytes"]), **checksum}


def _media_type(name: str) -> str:
    return _MEDIA_TYPES.get(PurePath(name).suffix.lower(), "application/octet-stream")


def _href(name: str) -> str:
    """A relative reference: the leading ./ keeps a colon in a name from being read as a scheme."""
    return f"./{quote(os.fsencode(name))}"


def _add(parent: Xml.Element, namespace: str, tag: str, text: str | None = None, **attributes: str) -> Xml.Element:
    child = Xml.SubElement(parent, f"{{{namespace}}}{tag}", attributes)
    child.text = None if text is None else _text(text)
    return child


def _text(text: str) -> str:
    """What XML cannot hold is percent-encoded."""
    return _NOT_IN_XML.sub(lambda found: quote(found[0].encode("utf-8", "surrogateescape")), text)


def _serialized(root: Xml.Element) -> bytes:
    Xml.indent(root)
    return Xml.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"
