// bfloat16 kernels for Paddle's CPU wheel, which lacks most of them: each converts to float32, runs the wheel's float32
// kernel, and rounds what comes out. Only operations whose GPU kernels take bfloat16 are listed, so that a type error
// that a GPU would raise is raised here too.
//
// tests/support/gpu_stand_in.py compiles and loads this file.

#include <cstdio>
#include <deque>
#include <string>
#include <vector>

#include "paddle/phi/backends/cpu/cpu_context.h"
#include "paddle/phi/common/bfloat16.h"
#include "paddle/phi/core/dense_tensor.h"
#include "paddle/phi/core/kernel_factory.h"
#include "paddle/phi/kernels/activation_grad_kernel.h"
#include "paddle/phi/kernels/activation_kernel.h"
#include "paddle/phi/kernels/concat_grad_kernel.h"
#include "paddle/phi/kernels/elementwise_add_grad_kernel.h"
#include "paddle/phi/kernels/elementwise_add_kernel.h"
#include "paddle/phi/kernels/elementwise_divide_grad_kernel.h"
#include "paddle/phi/kernels/elementwise_divide_kernel.h"
#include "paddle/phi/kernels/matmul_grad_kernel.h"
#include "paddle/phi/kernels/matmul_kernel.h"
#include "paddle/phi/kernels/swiglu_grad_kernel.h"
#include "paddle/phi/kernels/swiglu_kernel.h"

namespace {

using phi::CPUContext;
using phi::DataType;
using phi::DenseTensor;
using BF16 = phi::dtype::bfloat16;

// The float32 doubles of one call's arguments.
class Doubles {
 public:
  explicit Doubles(const CPUContext& context) : context_(context) {}

  const DenseTensor& Of(const DenseTensor& narrow) {
    if (narrow.dtype() != DataType::BFLOAT16) return narrow;
    DenseTensor& wide = New(narrow);
    if (narrow.has_allocation() && narrow.memory_size() > 0) {  // else the kernel does not need its values
      float* to = context_.template Alloc<float>(&wide);
      const BF16* from = narrow.data<BF16>();
      for (int64_t i = 0; i < narrow.numel(); ++i) to[i] = static_cast<float>(from[i]);
    }
    return wide;
  }

  const std::vector<const DenseTensor*>& Of(const std::vector<const DenseTensor*>& narrow) {
    lists_.emplace_back();
    for (const DenseTensor* tensor : narrow) lists_.back().push_back(tensor == nullptr ? nullptr : &Of(*tensor));
    return lists_.back();
  }

  const paddle::optional<DenseTensor>& Of(const paddle::optional<DenseTensor>& narrow) {
    if (!narrow) return narrow;
    options_.emplace_back(Of(*narrow));
    return options_.back();
  }

  DenseTensor* Of(DenseTensor* result) {
    if (result == nullptr || result->dtype() != DataType::BFLOAT16) return result;
    results_.push_back({result, &New(*result)});
    return results_.back().wide;
  }

  std::vector<DenseTensor*> Of(std::vector<DenseTensor*> results) {
    for (DenseTensor*& result : results) result = Of(result);
    return results;
  }

  template <typename T>
  const T& Of(const T& number) {
    return number;
  }

  void RoundResults() {
    for (const Result& result : results_) {
      result.narrow->Resize(result.wide->dims());
      BF16* to = context_.template Alloc<BF16>(result.narrow);
      if (!result.wide->has_allocation()) continue;  // a gradient that nobody asked for
      const float* from = result.wide->data<float>();
      for (int64_t i = 0; i < result.wide->numel(); ++i) to[i] = static_cast<BF16>(from[i]);
    }
  }

 private:
  struct Result {
    DenseTensor* narrow;
    DenseTensor* wide;
  };

  DenseTensor& New(const DenseTensor& like) {
    tensors_.emplace_back();
    const phi::DenseTensorMeta meta(DataType::FLOAT32, like.dims(), like.layout());
    tensors_.back().set_meta(meta);
    return tensors_.back();
  }

  const CPUContext& context_;
  // Containers that do not move what they hold.
  std::deque<DenseTensor> tensors_;
  std::deque<std::vector<const DenseTensor*>> lists_;
  std::deque<paddle::optional<DenseTensor>> options_;
  std::deque<Result> results_;
};

// The float32 kernel of each operation; `Op` is a type that knows its name.
template <typename Op>
phi::Kernel& Wide() {
  static phi::Kernel kernel;
  return kernel;
}

template <typename Op, typename... Args>
void Narrowed(const CPUContext& context, Args... args) {
  Doubles doubles(context);
  auto* wide = Wide<Op>().template GetVariadicKernelFn<void (*)(const CPUContext&, Args...)>();
  (*wide)(context, doubles.Of(args)...);
  doubles.RoundResults();
}

template <typename Op, typename... Args>
int Register(void (*)(const CPUContext&, Args...)) {
  auto& kernels = phi::KernelFactory::Instance().kernels()[Op::Name()];
  const phi::KernelKey wide(phi::Backend::CPU, phi::DataLayout::ALL_LAYOUT, DataType::FLOAT32);
  const phi::KernelKey narrow(phi::Backend::CPU, phi::DataLayout::ALL_LAYOUT, DataType::BFLOAT16);
  if (kernels.count(narrow)) return 0;
  if (!kernels.count(wide)) {
    std::fprintf(stderr, "this Paddle has no float32 kernel of %s\n", Op::Name());
    return 1;
  }
  Wide<Op>() = kernels[wide];
  phi::Kernel made(nullptr, reinterpret_cast<void*>(&Narrowed<Op, Args...>));
  *made.mutable_args_def() = kernels[wide].args_def();
  for (auto& input : made.mutable_args_def()->input_defs()) {
    if (input.dtype == DataType::FLOAT32) input.dtype = DataType::BFLOAT16;
  }
  for (auto& output : made.mutable_args_def()->output_defs()) {
    if (output.dtype == DataType::FLOAT32) output.dtype = DataType::BFLOAT16;
  }
  kernels[narrow] = made;
  return 0;
}

#define OPERATION(name, function)                  \
  struct name##_operation {                        \
    static const char* Name() { return #name; }    \
  };                                               \
  missing += Register<name##_operation>(static_cast<decltype(&phi::function<float, CPUContext>)>(nullptr));

}  // namespace

// The number of operations that could not be provided.
extern "C" int provide_bf16_kernels() {
  int missing = 0;
  OPERATION(matmul, MatmulKernel)
  OPERATION(matmul_grad, MatmulGradKernel)
  OPERATION(add, AddKernel)
  OPERATION(add_grad, AddGradKernel)
  OPERATION(divide, DivideKernel)
  OPERATION(divide_grad, DivideGradKernel)
  OPERATION(swiglu, SwiGLUKernel)
  OPERATION(swiglu_grad, SwiGLUGradKernel)
  OPERATION(concat_grad, ConcatGradKernel)
  OPERATION(silu, SiluKernel)
  OPERATION(silu_grad, SiluGradKernel)
  return missing;
}
