# CPU: docker build -t fusedet . && docker run --rm -v "$PWD:/work" fusedet train retinanet_r50 data=DATA out=runs/a
FROM python:3.12-slim
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch torchvision
COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
RUN pip install --no-cache-dir "/src[export]" && rm -r /src
WORKDIR /work
ENTRYPOINT ["fusedet"]
