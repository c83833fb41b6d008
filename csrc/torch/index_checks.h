// Range checks of integer inputs. With an index out of range, compiled code may crash the process,
// and other engines may return a number for an entry that the model does not support.

#ifndef TORCHCALL_TORCH_INDEX_CHECKS_H_
#define TORCHCALL_TORCH_INDEX_CHECKS_H_

#include <functional>
#include <vector>

#include "../engine.h"
#include "call_form.h"

namespace torchcall {

class IndexChecks {
 public:
  // Throws std::invalid_argument for an input that is not of an integer dtype.
  IndexChecks(const TcPlanSpec& spec, const CallForm& form);

  // Checks the inputs that the model gets, which must be in CPU memory. Throws
  // std::invalid_argument with the input's name, the first invalid entry and what was expected.
  void Run(const CallForm& form, const std::function<at::Tensor(int64_t)>& input) const;

 private:
  std::vector<TcIndexCheck> checks_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_INDEX_CHECKS_H_
