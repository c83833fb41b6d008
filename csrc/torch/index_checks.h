// Range checks of integer inputs. A model follows an index wherever it points: compiled code may
// end the process, and other engines may return a number for an entry that the model does not know.

#ifndef TORCHCALL_TORCH_INDEX_CHECKS_H_
#define TORCHCALL_TORCH_INDEX_CHECKS_H_

#include <functional>
#include <vector>

#include "../engine.h"
#include "call_form.h"

namespace torchcall {

class IndexChecks {
 public:
  // Throws std::invalid_argument for an operand that does not hold integers.
  IndexChecks(const TcPlanSpec& spec, const CallForm& form);

  // Checks inputs in CPU memory, as the model gets them. Throws std::invalid_argument that names
  // the operand, the first entry at fault, and what was expected there.
  void Run(const CallForm& form, const std::function<at::Tensor(int64_t)>& input) const;

 private:
  std::vector<TcIndexCheck> checks_;
};

}  // namespace torchcall

#endif  // TORCHCALL_TORCH_INDEX_CHECKS_H_
