// Lets NVIDIA's TensorRT bindings talk to the TensorRT-RTX library and its ONNX parser, which share the C++ interfaces of
// TensorRT and differ in library names and in the version number that callers must state. Tests only: see set_up.py.
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>

static void* real(const char* library, const char* name) {
    void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    void* symbol = handle ? dlsym(handle, name) : nullptr;
    if (!symbol) std::fprintf(stderr, "test rig: %s\n", dlerror()), std::abort();
    return symbol;
}

#define REAL(library, type) reinterpret_cast<type>(real(library, __func__))
constexpr const char *RTX = "libtensorrt_rtx.so", *PARSER = "libtensorrt_onnxparser_rtx.so.1";
constexpr int VERSION = 10701;
using One = void* (*)(void*, int);
using Two = void* (*)(void*, void*, int);

extern "C" {
void* createInferBuilder_INTERNAL(void* logger, int) { return REAL(RTX, One)(logger, VERSION); }
void* createInferRuntime_INTERNAL(void* logger, int) { return REAL(RTX, One)(logger, VERSION); }
void* createInferRefitter_INTERNAL(void* engine, void* logger, int) { return REAL(RTX, Two)(engine, logger, VERSION); }
void* getPluginRegistry() { return REAL(RTX, void* (*)())(); }
void* getBuilderPluginRegistry(int capability) { return REAL(RTX, void* (*)(int))(capability); }
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int) { return REAL(PARSER, Two)(network, logger, VERSION); }
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int) { return REAL(PARSER, Two)(refitter, logger, VERSION); }
int getNvOnnxParserVersion() { return VERSION; }
bool initLibNvInferPlugins(void*, const char*) { return true; }
}
