// Every schema, and the pybind11 module pyfast._C with the facts of this build. Kernels register
// themselves at the end of their own files; no tensor crosses pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"

extern "C" {   // written by pyfast/build.py
const char* pyfast_source_hash();
const char* pyfast_cuda_archs();
const char* pyfast_nvcc();
}

extern "C" {   // of csrc/cuda/cublaslt.cpp; null in a build for the CPU only
__attribute__((weak)) bool pyfast_choose_cublaslt(bool on);
__attribute__((weak)) bool pyfast_cublaslt_chosen();
}

STABLE_TORCH_LIBRARY(pyfast, m) {
  m.def("linear_act(Tensor x, Tensor weight, Tensor? bias, str act, bool save) -> (Tensor out, Tensor preact)");
  m.def("linear_act_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? saved, str act, bool need_x, "
        "bool need_weight, bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def("linear_glu(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias, str act, "
        "bool save) -> (Tensor out, Tensor gate, Tensor up)");
  m.def("linear_glu_backward(Tensor grad_out, Tensor x, Tensor gate_weight, Tensor up_weight, Tensor gate, "
        "Tensor up, str act, bool need_x, bool need_weight, bool need_bias) -> (Tensor grad_x, "
        "Tensor grad_gate_weight, Tensor grad_up_weight, Tensor grad_gate_bias, Tensor grad_up_bias)");

  // loss, lse and the class weights are float32 (float64 for float64 logits); loss is a scalar, or one per row for
  // reduction "none". lse [rows, 2] is log(sum(exp(x))) as the maximum and the logarithm of the sum of
  // exp(x - maximum): added up, they would lose digits.
  m.def("cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
        "str reduction) -> (Tensor loss, Tensor lse)");
  m.def("cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, Tensor lse, "
        "int ignore_index, float label_smoothing, str reduction) -> Tensor");

  // Of a scalar loss (reduction "mean" or "sum") in float32 or float64, the needed gradients are made in the same
  // pass; all others are made by the backward op, which computes the logits again. lse as of cross_entropy.
  m.def("linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
        "int ignore_index, float label_smoothing, str reduction, bool need_x, bool need_weight, bool need_bias) -> "
        "(Tensor loss, Tensor lse, Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def("linear_cross_entropy_backward(Tensor grad_loss, Tensor x, Tensor weight, Tensor? bias, Tensor target, "
        "Tensor? class_weight, Tensor lse, int ignore_index, float label_smoothing, str reduction, bool need_x, "
        "bool need_weight, bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");

  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale) -> "
        "(Tensor out, Tensor lse)");
  m.def("attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, "
        "bool is_causal, float scale, bool need_mask) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, "
        "Tensor grad_mask)");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor");

  // sum is x + residual, or empty where there is no residual.
  m.def("layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps) -> "
        "(Tensor out, Tensor sum, Tensor mean, Tensor rstd)");
  m.def("layer_norm_backward(Tensor grad_out, Tensor? grad_sum, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
        "bool need_weight, bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def("rms_norm(Tensor x, Tensor? residual, Tensor? weight, float eps) -> (Tensor out, Tensor sum, Tensor rstd)");
  m.def("rms_norm_backward(Tensor grad_out, Tensor? grad_sum, Tensor x, Tensor rstd, Tensor? weight, "
        "bool need_weight) -> (Tensor grad_x, Tensor grad_weight)");

  // hyper [P, 6] float64: lr, beta1, beta2, eps, weight_decay, step of each parameter. max_exp_avg_sqs and
  // masters are empty lists or have one entry per parameter, a master of no elements meaning "none". found_inf is
  // float32 of one element, beside the parameters: where it is not 0 only the norm is made, and nothing is stepped.
  m.def("adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, Tensor hyper, bool decoupled, bool maximize, "
        "float grad_scale, float max_norm, Tensor? found_inf=None) -> Tensor");
}

namespace {

std::vector<std::string> cuda_archs() {
  std::vector<std::string> archs;
  std::istringstream list(pyfast_cuda_archs());   // "80;90a", or nothing
  for (std::string arch; std::getline(list, arch, ';');) archs.push_back(arch);
  return archs;
}

constexpr pyfast::Isa kLevels[] = {pyfast::Isa::generic, pyfast::Isa::avx2, pyfast::Isa::avx512,
                                    pyfast::Isa::avx512_bf16, pyfast::Isa::amx};

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (auto isa : kLevels)
    if (pyfast::isa_supported(isa)) names.emplace_back(pyfast::isa_name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts of this build of pyfast, and the choice of instruction set. Operations are in torch.ops.pyfast.";
  m.attr("source_hash") = pyfast_source_hash();
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_archs") = cuda_archs();
  m.attr("nvcc") = pyfast_nvcc();
  m.def("supported_isas", &supported_isas, "Instruction sets this processor can run, slowest first.");
  m.def("isa", [] { return std::string(pyfast::isa_name(pyfast::current_isa())); }, "The one in use.");
  m.def("select_isa", [](const std::string& name) { return pyfast::select_isa(name.c_str()); }, pybind11::arg("name"),
        "Use another instruction set; False if this processor cannot.");
  m.def("choose_cublaslt", [](bool on) { return pyfast_choose_cublaslt ? pyfast_choose_cublaslt(on) : !on; },
        pybind11::arg("on"),
        "Let cuBLASLt, where it can, multiply for linear_act on CUDA; False where it is not installed.");
  m.def("cublaslt_chosen", [] { return pyfast_cublaslt_chosen && pyfast_cublaslt_chosen(); }, "Whether it does.");
}
