"""A predictor in; the application that answers HTTP requests out."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

import fcn_dist
from fcn_dist.deploy.imagefiles import TooManyPixels, read_rgb
from fcn_dist.deploy.predict import Predictor
from fcn_dist.errors import UserError
from fcn_dist.model.devices import out_of_memory
from fcn_dist.serving.answers import FORMATS, KINDS, figures, label_png, model_card, preferred
from fcn_dist.serving.guard import Lingering, OwnSite, SecurityHeaders
from fcn_dist.serving.limits import Limits, Turns
from fcn_dist.serving.uploads import FORM, Upload, read_upload

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGES = {"/": "index.html", "/docs": "docs.html"}  # under their own names otherwise, below /page/
BINARY = {"schema": {"type": "string", "format": "binary"}}
FORM_SCHEMA = {"type": "object", "required": ["file"], "properties": {"file": BINARY["schema"]}}
PREDICT_DOCUMENTATION: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"image/*": BINARY, "application/octet-stream": BINARY, FORM: {"schema": FORM_SCHEMA}},
    }
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is empty, or a form without one file."},
    403: {"description": "Another site's page asked."},
    406: {"description": "Neither JSON nor PNG is accepted."},
    408: {"description": "The upload took too long."},
    413: {"description": "Too many bytes or pixels, or more than the device's memory holds."},
    415: {"description": "The body is neither an image nor a form."},
    421: {"description": "The server was called by a name that is not its own."},
    422: {"description": "The image cannot be decoded."},
    503: {"description": "Too many images are waiting (see Retry-After), or the server is stopping."},
}


def build_app(
    predictor: Predictor, limits: Limits, turns: Turns, worker: Executor, hosts: frozenset[str] | None
) -> FastAPI:
    """`worker` has one thread, on which images are decoded and labelled. `hosts`: see OwnSite."""
    app = FastAPI(title="fcn-dist", version=fcn_dist.__version__, docs_url=None, redoc_url=None)
    # The last is the outermost.
    app.add_middleware(OwnSite, hosts=hosts)
    app.add_middleware(Lingering)
    app.add_middleware(SecurityHeaders)
    app.add_exception_handler(RequestValidationError, _misspelt)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _bug)
    _add_pages(app)
    _add_facts(app, predictor, limits, turns)
    _add_predict(app, Labelling(predictor, limits, turns, worker))
    return app


def _misspelt(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong = "; ".join(f"{problem['loc'][-1]}={problem['input']!r}: {problem['msg']}" for problem in error.errors())
    return JSONResponse({"detail": wrong}, 422)


def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=400)  # to nobody


def _bug(_: Request, __: Exception) -> Response:
    """The traceback goes to the server's terminal."""
    return JSONResponse({"detail": "the server has a bug; its terminal says more"}, 500)


def _add_pages(app: FastAPI) -> None:
    folder = files("fcn_dist.serving") / "page"
    contents = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}
    paths = {f"/page/{name}": name for name in contents} | PAGES
    for path, name in paths.items():
        media = TYPES[name[name.index(".") :]]
        app.add_api_route(path, _constant(contents[name], media), methods=["GET", "HEAD"], include_in_schema=False)


def _constant(content: bytes, media: str) -> Callable[[], Response]:
    return lambda: Response(content, media_type=media)


def _add_facts(app: FastAPI, predictor: Predictor, limits: Limits, turns: Turns) -> None:
    card = model_card(predictor, limits)

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """Classes with their labels and colours, where the model came from, and the limits of an upload."""
        return card

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """That the server answers, and how many images are being worked on or wait."""
        return {"status": "ok", "requests": turns.inside}


def _add_predict(app: FastAPI, labelling: "Labelling") -> None:
    @app.post(
        "/predict",
        openapi_extra=PREDICT_DOCUMENTATION,
        response_class=Response,
        responses={
            200: {"description": "Labels.", "content": {"image/png": BINARY, "application/json": {}}},
            **REFUSALS,
        },
    )
    async def predict(
        request: Request,
        format: Annotated[Literal["json", "png"] | None, Query(description="Goes before the Accept header.")] = None,
    ) -> Response:
        """Label an image: pixels of each class as JSON, or the labels themselves as an 8-bit gray PNG of its size."""
        chosen = format or preferred(",".join(request.headers.getlist("accept")))
        if not chosen:
            raise HTTPException(406, f"only {' and '.join(FORMATS.values())} can be given; accept one of them")
        return await labelling.answer(request, chosen)


class Labelling:
    """Uploads to answers: as many as `turns` lets in, one at a time."""

    def __init__(self, predictor: Predictor, limits: Limits, turns: Turns, worker: Executor) -> None:
        self._predictor = predictor
        self._limits = limits
        self._turns = turns
        self._worker = worker

    async def answer(self, request: Request, format: str) -> Response:
        """To one request, or an HTTP error."""
        async with self._turns.let_in():
            return await self._turns.until_closed(self._answer(request, format))

    async def _answer(self, request: Request, format: str) -> Response:
        upload = await read_upload(request, self._limits)
        async with self._turns.turn():
            if await request.is_disconnected():
                raise ClientDisconnect
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._worker, self._label, upload, format)

    def _label(self, upload: Upload, format: str) -> Response:
        """On the worker's thread."""
        try:
            image = read_rgb(upload.file, upload.name, self._limits.max_pixels, KINDS)
            upload.file.close()  # its bytes are not needed any more
            labels = self._predictor.predict(image)
        except TooManyPixels as error:
            raise HTTPException(413, str(error)) from error
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            device = self._predictor.device
            raise HTTPException(413, f"{upload.name} does not fit the memory of {device}; shrink it") from error
        if format == "png":
            return Response(label_png(labels), media_type=FORMATS[format])
        return JSONResponse(figures(upload.name, labels, self._predictor))
