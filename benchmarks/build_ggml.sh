#!/usr/bin/env bash
# llama.cpp's product library as llama-cpp-python bundles it, without the rest (3 minutes on 2 cores instead of 20):
#   benchmarks/build_ggml.sh          build/ggml/native, for this CPU, which benchmarks/ggml.py looks for
#   benchmarks/build_ggml.sh avx2     build/ggml/avx2, to be chosen by LLMFP4_GGML=build/ggml/avx2
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-native} package=llama-cpp-python==0.3.36 folder=$PWD/build/ggml
case $kind in
    native) options=() ;;
    avx2) options=(-DGGML_NATIVE=OFF -DGGML_{SSE42,AVX,AVX2,BMI2,FMA,F16C}=ON) ;;
    *) echo "expected native or avx2, got $kind" >&2; exit 2 ;;
esac

mkdir -p "$folder"
source=$folder/${package/==/-}
if [ ! -d "$source" ]; then
    ${PYTHON:-python3} -m pip download --quiet --no-deps --no-binary "${package%==*}" --dest "$folder" "$package"
    mkdir "$source.part"
    tar xzf "$folder"/llama_cpp_python-*.tar.gz -C "$source.part" --strip-components 1
    # GCC 12's _tile_loadconfig tells the compiler of 8 of the 64 bytes it reads, so the rest may never be written; and a
    # configuration loaded once per thread is gone after oneDNN's next product. Both end in SIGILL.
    sed -i 's/static thread_local bool done = false;/bool done = false;/
            s/_tile_loadconfig(&tc);/asm volatile("" : : "r"(\&tc) : "memory"); _tile_loadconfig(\&tc);/' \
        "$source.part/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"
    mv "$source.part" "$source"
fi
parts=(-DLLAMA_BUILD_{COMMON,TESTS,TOOLS,EXAMPLES,SERVER,APP}=OFF)
cmake -S "$source/vendor/llama.cpp" -B "$folder/$kind.build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
    -DGGML_CCACHE=OFF "${parts[@]}" "${options[@]}" >/dev/null
cmake --build "$folder/$kind.build" --target ggml
mkdir -p "$folder/$kind"
cp "$folder/$kind.build"/bin/lib*.so* "$folder/$kind/"
