"""The committed code of protos/ is what the .proto files say, and old runtimes can load it."""

import importlib
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

SOURCE_ROOT = Path(__file__).parents[2] / "src"
PROTOS = sorted((SOURCE_ROOT / "scission" / "protos").glob("*.proto"))


def compile_descriptor(proto: Path, output: Path) -> descriptor_pb2.FileDescriptorProto:
    protoc = pytest.importorskip("grpc_tools.protoc")
    name = str(proto.relative_to(SOURCE_ROOT))
    status = protoc.main(["protoc", f"-I{SOURCE_ROOT}", f"--descriptor_set_out={output}", name])
    assert status == 0, f"{name} does not compile"
    files = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes()).file
    return next(file for file in files if file.name == name)


@pytest.mark.parametrize("proto", PROTOS, ids=lambda proto: proto.stem)
def test_committed_descriptor_equals_the_proto(proto: Path, tmp_path: Path) -> None:
    expected = compile_descriptor(proto, tmp_path / "descriptor")
    for field in all_fields(expected):
        # runtimes before 5.26 leave it out, later ones fill it in: it says nothing of its own
        field.ClearField("json_name")
    module = importlib.import_module(f"scission.protos.{proto.stem}_pb2")
    committed = descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
    for field in all_fields(committed):
        field.ClearField("json_name")
    assert committed == expected, "run `make protos` and commit what it made"


def all_fields(
    file: descriptor_pb2.FileDescriptorProto,
) -> list[descriptor_pb2.FieldDescriptorProto]:
    messages = list(file.message_type)
    fields = []
    while messages:
        message = messages.pop()
        messages.extend(message.nested_type)
        fields.extend(message.field)
    return fields


@pytest.mark.parametrize("proto", PROTOS, ids=lambda proto: proto.stem)
def test_services_have_committed_stubs(proto: Path) -> None:
    module = importlib.import_module(f"scission.protos.{proto.stem}_pb2")
    for service in module.DESCRIPTOR.services_by_name:
        stubs = importlib.import_module(f"scission.protos.{proto.stem}_pb2_grpc")
        assert hasattr(stubs, f"{service}Stub") and hasattr(stubs, f"{service}Servicer")


@pytest.mark.parametrize("proto", PROTOS, ids=lambda proto: proto.stem)
def test_generated_code_loads_on_old_runtimes(proto: Path) -> None:
    """Compilers from 5.27 on write a version check that refuses every older runtime."""
    generated = proto.with_name(f"{proto.stem}_pb2.py").read_text()
    assert "runtime_version" not in generated, (
        "generate with `make protos`, not with a newer compiler"
    )
